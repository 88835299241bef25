"""The CPU backend: OpenVINO for everything but the attention of decoding steps. Needs the extra `cpu`.

`backend` has it, and needs numba too; `lower` and `encoder`, with which exports are written, do not.
"""
