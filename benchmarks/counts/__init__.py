"""Operations, bytes and launches held against the accepted ones."""
