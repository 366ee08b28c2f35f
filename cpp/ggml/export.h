// What the backend's library shows to others.
#pragma once

#define SPARSEK_EXPORT extern "C" __attribute__((visibility("default")))
