"""What the benches run: reference models and their pipelines, samplers and schedules by name."""
