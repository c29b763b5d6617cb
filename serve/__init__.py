"""The Ray Serve application: gateway, encoder, language model, vocoder; the `serve` and `chat` verbs; the web page."""
