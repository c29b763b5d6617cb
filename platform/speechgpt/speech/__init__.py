"""Waveform <-> units: decoding, HuBERT features, k-means, unit notation, vocoder, packaged voices."""
