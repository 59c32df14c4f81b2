"""Independent double-precision references for the runtime, and the tiny models they are run on.

Everything here is written from the formulas with NumPy alone: it shares no code with `frspec`.
"""
