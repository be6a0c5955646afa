"""cuDNN's fused attention: single-device functions of plain arrays.

`call` states the two calls as XLA has them; `attention` folds RAT's attention to summaries into them.
"""
