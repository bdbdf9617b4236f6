"""The masked autoencoder: encoder, decoders, masks, position embeddings and targets."""
