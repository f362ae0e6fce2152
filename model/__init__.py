"""The model: plain step data in, sampled tokens out. Owns every tensor; decides nothing."""
