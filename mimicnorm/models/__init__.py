"""The networks of the papers, each in its BatchNorm form."""
