"""Models of one training job: step time, memory, noise, samples to target, learning rate."""
