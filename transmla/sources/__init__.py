"""Where models come from: hub, directory, GGUF file, package index, random weights."""
