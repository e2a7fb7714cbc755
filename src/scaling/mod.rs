//! Policies and shared mechanisms of scale.
