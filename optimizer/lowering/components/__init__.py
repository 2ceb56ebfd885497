"""Components of a checkpoint (encoder, decoder, …): their inputs, outputs and calls."""
