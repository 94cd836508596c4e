"""The ``spectrum_regression`` pytest fixture."""
