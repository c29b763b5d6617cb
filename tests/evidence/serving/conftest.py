"""The serving side's tiny bundles, of whom its own tests are."""

from fixtures_of import fixtures_of

_serve = fixtures_of("serve")
tiny, tiny_bundle, endless_bundle = _serve.tiny, _serve.tiny_bundle, _serve.endless_bundle
clip, long_clip = _serve.clip, _serve.long_clip
