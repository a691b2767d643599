# SPDX-License-Identifier: Apache-2.0
"""How well does it learn for its tokens, minutes and FLOP, and thanks to what?"""
