"""SpeechGPT as a platform on Ray: speech becomes units, units become words of a language model, and back."""

__version__ = "0.1.0"
