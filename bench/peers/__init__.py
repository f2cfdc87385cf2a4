"""Other people's detectors as engines of the harness, run by `run_peer.py` in their own interpreter (Python 3.10 on).

The interpreter of a peer has neither the rest of `bench` nor `diffinst` with what they need. Nothing here imports them
but for `diffinst.weights.unpickle`, which reads pickles with numpy alone and lies beside in the same folder.
"""
