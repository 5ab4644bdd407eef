"""The detector: configuration, backbones, attention, decoder, heads."""
