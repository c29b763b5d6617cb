"""`speechgpt bench`: what this machine does, against what the published programs do on it in the same run."""
