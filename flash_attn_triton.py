# SPDX-License-Identifier: Apache-2.0
"""Where the Triton kernel for variable-length attention with ALiBi goes. It is not written yet.

bert_layers.py imports `flash_attn_varlen_qkvpacked_func` from here and, while that fails, offers
the other backends.
"""

raise ImportError("this version of the package has no Triton kernel yet")
