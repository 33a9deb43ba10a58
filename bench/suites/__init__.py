"""Where the time goes, part by part: pytest-benchmark suites, `pytest bench/suites --benchmark-only`.

A group asks one question, its members are the answers. Names stay the same from commit to commit, so that
``--benchmark-save=NAME`` and later ``--benchmark-compare`` show what a change cost. One thread, on the CPU; on CUDA,
`make bench-gpu` times the kernels.
"""
