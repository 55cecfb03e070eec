#pragma once

/// The engine in C++: what `find_package(nanoflow)` offers. tests/cpp/embed/ is a program that uses
/// it, with a page that explains it.

#include "core/error.h"
#include "kernels/backend.h"
#include "model/model_folder.h"
#include "model/spec.h"
#include "model/weights.h"
#include "pipeline/batch.h"
#include "pipeline/engine.h"
#include "pipeline/schedule.h"
