"""What researchers need and users do not: attacks, baselines, their comparison with our method, corrupted images."""
