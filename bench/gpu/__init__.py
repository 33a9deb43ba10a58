"""What `bench/run_gpu.py` measures on a card, one stage a file."""
