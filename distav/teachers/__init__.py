"""What is asked of teachers: frozen networks that know words, for what is heard and for what is seen."""
