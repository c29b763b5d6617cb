"""`tokenize_driver` whose workers sleep so many seconds a shard where they would compute: what is left is Ray and us.

python sleeping_driver.py WORKSPACE SECONDS [section.key=value ...]
"""

import sys
import time

import numpy as np
import tokenize_driver

from jobs import tokenize_speech
from speechgpt.runtime.workspace import Workspace

place, seconds, *settings = sys.argv[1:]


class Sleeper(tokenize_speech.Tokenizer):
    def _encode(self, clips):
        time.sleep(float(seconds))
        return [clip.row(np.zeros(1, np.int16), np.ones(1, np.int16)) for clip in clips]


if __name__ == "__main__":
    tokenize_speech.Tokenizer = Sleeper
    print(tokenize_driver.tokenize(Workspace(place), *settings)["figures"])
