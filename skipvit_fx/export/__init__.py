"""ONNX files. The extra ``skipvit_fx[onnx]`` is needed only when this is used."""
