"""dia-fast behind other people's interfaces; one module or package for each guest, imported when it is asked for."""
