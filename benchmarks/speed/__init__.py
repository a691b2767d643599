# SPDX-License-Identifier: Apache-2.0
"""How fast is the model, and how much memory does it take, beside others?"""
