"""The box head, the mask branch and the dynamic mask head."""
