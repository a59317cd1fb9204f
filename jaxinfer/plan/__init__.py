"""Plans for machines that are not there: does a program fit, what limits it, how long does a step take.

report = plan(Request(model="llama3-70b", passes=("int8", "kv_int8"), topology="v5e:4x4", mesh="model=16", batch=32))
"""
