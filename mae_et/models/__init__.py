"""The masked autoencoder: encoder, decoders, masks, position embeddings, targets."""
