"""The HTTP side of a policy: what training adds to an OpenAI-compatible server. Pure: no ray, no vllm."""
