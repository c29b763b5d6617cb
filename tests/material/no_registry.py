"""An alias of nobody's, for promotions of bundles that are in no registry."""


class NoRegistry:
    def move(self, digest: str) -> None:
        pass

    def leave(self, new: str, old: str) -> None:
        pass
