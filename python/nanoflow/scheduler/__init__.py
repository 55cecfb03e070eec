"""The asynchronous scheduler: which request runs which tokens in the next step."""
