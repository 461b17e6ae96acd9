//! Whole operations made of images and the mirror: stream, commit.
