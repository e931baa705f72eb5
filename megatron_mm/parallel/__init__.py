"""What is cut over ranks, on megatron-core.

megatron-core compiles functions as it is imported, and so loads torch's compiler: three CPU seconds a process. It is
imported here, before any module that needs it.
"""

from megatron_mm.parallel.compile_later import compiling_later

with compiling_later():
    import megatron.core  # noqa: F401
