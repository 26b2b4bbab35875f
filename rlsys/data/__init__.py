"""Problems, and the rows of data sets that they are read from."""
