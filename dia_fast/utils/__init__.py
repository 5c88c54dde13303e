"""Small things that every room uses: files, values, warnings, progress. Nothing here knows of speech."""
