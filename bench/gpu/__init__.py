"""What runs on a GPU or counts as one: `bench/gpu.sh`, sanitizers, counted memory traffic."""
