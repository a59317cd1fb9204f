"""Programs on many devices: a mesh, the rules that say which axis lies where, and the pass that puts a program there.

mesh = make_mesh(parse_mesh("data=2,model=4"))
program = shard(mesh, RULES["tensor"])(program)
"""
