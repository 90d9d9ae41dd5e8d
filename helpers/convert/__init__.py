"""Other models of the same architecture, converted exactly into first-generation Qwen's layout."""
