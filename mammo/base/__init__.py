"""What every room uses: files, guards, tables, resumable work, command lines, statistics."""
