"""The distribution's codec, fitted in calibration: its tail's basis, the choice of head and step, its fidelity, its cost."""
