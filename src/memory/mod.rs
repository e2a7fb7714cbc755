//! What an instance remembers: recall over its episodes.
