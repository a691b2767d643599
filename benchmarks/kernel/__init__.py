# SPDX-License-Identifier: Apache-2.0
"""How fast is attention, which tiles are best, and what do the kernels take of a chip?"""
