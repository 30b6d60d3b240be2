"""The mesh, and which logical axes are laid along which of its axes."""
