"""Other people's detectors as engines of the harness, run by `run_peer.py` in their own interpreter (Python 3.10 on).

Nothing here imports the rest of `bench`, or `diffinst`: the interpreter of a peer has neither.
"""
