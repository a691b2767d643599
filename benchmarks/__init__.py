# SPDX-License-Identifier: Apache-2.0
"""How fast, how well it learns, and what the kernel takes: a folder for each question."""
