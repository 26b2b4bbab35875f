"""Wire formats: JSON models, protobuf messages, and their conversion to columns. No loop over tokens."""
