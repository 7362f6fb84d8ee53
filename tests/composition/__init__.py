"""How ops and modules compose with the rest of PyTorch: one table of cases, one file for each thing to compose with."""
