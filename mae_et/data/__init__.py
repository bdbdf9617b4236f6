"""From files to micro-batches: datasets, decoding, transforms, sampler, loader."""
